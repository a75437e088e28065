"""The rules for a call: checks of arguments, padded and packed layouts, the lm_head, function transforms."""
