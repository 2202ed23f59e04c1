"""The operators in plain torch, one module per operator group, named as the group in :mod:`geossl.ops`.

They are the definition that kernels are tested against, and what runs when no native library is there. Same arguments and results as the
registered operators. Written to be read and to be exact, not to be fast: squared distances are ``(dx * dx + dy * dy) + dz * dz``, one
rounding per operation, so that these give the same indices as the kernels, bit for bit.
"""
