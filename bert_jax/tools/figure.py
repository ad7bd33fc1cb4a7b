"""The class of the figures in `viz` and `report`."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A matplotlib figure that is made without pyplot and that notebooks show as an image.

    Figures made with pyplot stay in memory until they are closed. IPython would show a figure made without pyplot as
    text. This class therefore adds `_repr_png_`, the method that IPython calls to show an image.
    """

    def _repr_png_(self) -> bytes:
        """The PNG file that IPython shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
