"""The class of the figures in `viz` and `report`."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A matplotlib figure that notebooks show although pyplot did not make it.

    IPython shows other figures that pyplot did not make only as text. A figure that pyplot made stays in memory until
    it is closed.
    """

    def _repr_png_(self) -> bytes:
        """The PNG file that IPython shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
