"""HTML pages with tables and charts, which need only a browser: no network, no script."""
