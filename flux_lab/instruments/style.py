"""Colours and sizes that all pictures share.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
"""

BLUE, VERMILLION, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
INK, FAINT, PAPER, PALE = "#1a1a1a", "#b5b5b5", "#ffffff", "#eef3f7"
LIT = "#ffc94d"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE)
SIGNED = "PuOr"  # for values on both sides of zero

WIDTH = 10.0  # inches: a notebook's width
DPI = 100
