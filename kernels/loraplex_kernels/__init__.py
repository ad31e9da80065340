"""Operations over tensors: one public function each, with a readable reference and faster forms."""
