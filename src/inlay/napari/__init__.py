"""The plug-in for napari: a panel that segments a scan and follows points, and a reader that keeps a scan's place."""
