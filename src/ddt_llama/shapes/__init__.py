"""The embedded synthetic world: scenes, their pictures, their descriptions, and a verifier.

Everything here is a pure function of a seed and an index, so a data set is two integers.
"""
