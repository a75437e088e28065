"""torch.library operators: schema, fake kernels and autograd, one file per operator; dispatch to a backend.

Every operator takes flat tensors ([M] positions, see ``layout``) and works out the valid rows inside itself, so that a
compiled graph sees one opaque node whatever the mask.
"""
