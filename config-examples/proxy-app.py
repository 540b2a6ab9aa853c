#!/usr/bin/env python3
"""A small application for proxy.yml: notes in SQLite. It knows nothing of nodes and clusters.

    proxy-app.py DATABASE PORT

GET /notes lists the notes, POST /notes with text=… adds one, GET /notes/clear removes all.
"""
import sqlite3
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

DATABASE, PORT = sys.argv[1], int(sys.argv[2])


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/notes":
            self.answer(200, "".join(text + "\n" for (text,) in self.sql("SELECT text FROM notes ORDER BY id")))
        elif self.path == "/notes/clear":
            self.sql("DELETE FROM notes")
            self.answer(200, "cleared\n")
        else:
            self.answer(404, "there is only /notes here\n")

    def do_POST(self):
        form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        # The first write on the primary makes the table; on a replica it arrives with the data.
        self.sql("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT)")
        self.sql("INSERT INTO notes (text) VALUES (?)", parse_qs(form).get("text", [""]))
        self.answer(201, "added\n")

    def sql(self, statement, values=()):
        database = sqlite3.connect(DATABASE, timeout=10)
        try:
            with database:
                return database.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            database.close()

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", PORT), App).serve_forever()
