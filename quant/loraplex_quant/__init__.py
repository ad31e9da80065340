"""Weight formats: how a linear layer's weight is stored and applied."""
