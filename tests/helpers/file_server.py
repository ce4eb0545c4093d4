"""An HTTP server of one file, with the faults that downloads must survive."""

import http.server
import os


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path. `mode`: ranges, no ranges, cut (half of what is asked), missing."""

    content, mode = os.urandom(0), "ranges"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.mode != "no ranges" else 0
        if server.mode == "missing":
            return self.send_error(404)
        if start and start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if server.mode == "cut" else body)

    def log_message(self, *arguments):
        pass
