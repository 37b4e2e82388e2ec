"""JSON-RPC 2.0: envelope, method table, dispatcher, OpenRPC, HTTP server and client."""
