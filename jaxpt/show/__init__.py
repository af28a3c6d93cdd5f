"""Let a person see an objective: a row, what networks read of it, what they must predict, and who sees whom."""

from jaxpt.show.look import Look, look
from jaxpt.show.page import write_page
from jaxpt.show.picture import write_picture
from jaxpt.show.terminal import print_look

__all__ = ["Look", "look", "print_look", "write_page", "write_picture"]
