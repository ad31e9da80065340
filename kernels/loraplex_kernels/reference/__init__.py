"""The operations in plain torch: the truth that tests compare with."""
