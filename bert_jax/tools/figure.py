"""The figure class that `viz` and `report` use."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A Matplotlib figure that is created without `pyplot` and that notebooks display as an image.

    Figures created with `pyplot` stay in memory until they are closed. If a figure was created without `pyplot`,
    IPython displays it as text by default. This class therefore adds `_repr_png_`, which IPython calls to display an
    image.
    """

    def _repr_png_(self) -> bytes:
        """Returns the figure as a PNG file, which IPython displays."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
