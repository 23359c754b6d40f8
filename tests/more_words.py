"""A second file of the user's, with an enum that the strategies in the first one hold."""

import enum


class MoreWords(enum.Enum):
    A = 1
    B = (2, "b")
