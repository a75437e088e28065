"""What a call must look like: checks of arguments, padded and packed layouts, the lm_head, function transforms."""
