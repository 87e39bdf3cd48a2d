"""The checker behind every signature under test: beartype, with int allowed where float is asked.

A module of its own, because jaxtyping's import hook wants the checker's dotted name.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
