"""The policies that count instead of predicting, one small file each."""
