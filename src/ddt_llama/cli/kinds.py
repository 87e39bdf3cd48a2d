"""Kinds of arguments that several verbs take, as tyro shows them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

Model = Annotated[Positional[str], arg(metavar="MODEL")]
Number = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]
WholeNumber = Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")]
Adapter = Annotated[str | None, arg(metavar="ADAPTER", help_behavior_hint="")]
Weights = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    arg(metavar="{float32,bfloat16,int8}", help_behavior_hint=""),
]
# What `split_fields` found: never read by tyro itself.
Fields = Annotated[Mapping[str, str] | None, Suppress]
