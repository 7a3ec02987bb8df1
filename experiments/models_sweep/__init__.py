"""Which causal models of the installed transformers are exact, and which are refused: a sweep and its page."""
