"""The figures of `viz` and `report`."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A matplotlib figure that every notebook shows.

    IPython shows only the text representation of a figure that pyplot did not make. A figure that pyplot makes stays in
    memory until it is closed.
    """

    def _repr_png_(self) -> bytes:
        """The PNG file that IPython shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
