// The page's service worker. It asks the network first and keeps each answer for when there is none; and it says that
// the page is isolated from others, without which browsers give WebAssembly no threads.

const KEPT = `messnet ${registration.scope}`;
const ISOLATED = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

addEventListener("install", (event) => {
  skipWaiting();
  // What the page had loaded before this worker could see it.
  event.waitUntil(caches.open(KEPT).then((kept) => kept.addAll(["./", "page.css", "page.js", "source.js"])));
});
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(registration.scope)) event.respondWith(answer(event));
});

async function answer(event) {
  const kept = await caches.open(KEPT);
  let response;
  try {
    response = await fetch(event.request);
    if (response.ok) event.waitUntil(kept.put(event.request, response.clone()));
  } catch (error) {
    response = await kept.match(event.request);
    if (!response) throw error;
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
