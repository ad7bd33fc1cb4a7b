"""The class of the figures in `viz` and `report`."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A matplotlib figure that is made without pyplot and that notebooks show.

    Figures made with pyplot are not used, because they stay in memory until they are closed. IPython shows matplotlib's
    own figures only as text if they are made without pyplot.
    """

    def _repr_png_(self) -> bytes:
        """The PNG file that IPython shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
