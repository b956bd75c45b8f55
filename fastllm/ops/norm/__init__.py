"""Layer norm and RMS norm, alone and after a residual add."""
