"""What a run is conditioned on besides text. Imports nothing, so that ``sizes`` costs no torch."""
