// Calls of the server. Errors carry its message, which says what to do.

function headers(key) {
  const all = { "Content-Type": "application/json" };
  return key ? { ...all, Authorization: `Bearer ${key}` } : all;
}

async function refusal(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`the server answers ${response.status} ${response.statusText}`);
  }
}

async function call(path, body, key, signal) {
  const options = body && { method: "POST", body: JSON.stringify(body), signal };
  const response = await fetch(path, { headers: headers(key), ...options });
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function getJson(path, key) {
  return (await call(path, null, key)).json();
}

export async function postJson(path, body, key, signal) {
  return (await call(path, body, key, signal)).json();
}

// Yields the chunks of a streamed answer.
export async function* stream(path, body, key, signal) {
  const response = await call(path, { ...body, stream: true }, key, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:"));
      const content = data.map((line) => line.slice(5).trim()).join("\n");
      if (!content || content === "[DONE]") continue;
      const chunk = JSON.parse(content);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
