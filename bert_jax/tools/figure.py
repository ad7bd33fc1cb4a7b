"""The class of the figures that `viz` and `report` make."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A matplotlib figure that every notebook shows.

    If pyplot did not make a figure, IPython shows only its text representation. If pyplot made it, the figure stays in
    memory until it is closed.
    """

    def _repr_png_(self) -> bytes:
        """The PNG file that IPython shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
