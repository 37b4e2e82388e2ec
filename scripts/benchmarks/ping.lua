-- What wrk sends: one node.ping a request, over keep-alive.
wrk.method = "POST"
wrk.body = '{"jsonrpc":"2.0","method":"node.ping","id":1}'
wrk.headers["Content-Type"] = "application/json"
