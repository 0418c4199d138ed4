// Refinements as the service computes them that the page came from.

export const texts = {
  privacy: ["It goes to this service and nowhere else."],
  "no-samples": ["Start the service with --samples FOLDER to offer images here."],
  footer: [
    "Milliseconds are the network’s own, on the machine that serves this page. The same from a program: ",
    link("/openapi.json", "openapi.json"), ", ", link("/v1/info", "model"), ", ", link("/metrics", "metrics"), ".",
  ],
};

function link(href, text) {
  return Object.assign(document.createElement("a"), { href, textContent: text });
}

export async function open() {
  try {
    return await (await fetch("/v1/info")).json();
  } catch {
    throw new Error("The service does not answer; reload the page when it runs again.");
  }
}

export async function* refine({ blob }, rule, signal) {
  try {
    const response = await fetch(`/v1/anytime?${new URLSearchParams(rule)}`, { method: "POST", body: blob, signal });
    if (!response.ok) throw new Error((await response.json()).error);
    for await (const record of lines(response.body)) {
      if (record.error) throw new Error(record.error);
      yield record.stopped ? record : { ...record, mask: png(record.mask) };
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error("The service does not answer; try again when it runs.") : error;
  }
}

function png(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
