"""Which features of which kernel belong to which head."""
