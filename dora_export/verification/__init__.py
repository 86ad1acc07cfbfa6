"""Proof that what was written is what was meant; shares no arithmetic with the engine."""
