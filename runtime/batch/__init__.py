"""Answer a file of requests with several workers; what is finished survives any end."""
