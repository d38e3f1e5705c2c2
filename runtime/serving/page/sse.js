// Server-sent events from a `fetch`: EventSource can neither send a POST nor a key.

// Yields the data of each event. Ends with the stream; what is left of an unfinished event is
// dropped, as the standard says.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // other fields, and comments that keep the connection open, mean nothing here
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader that leaves early frees the server
  }
}
