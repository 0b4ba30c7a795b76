// The way to Python, where there is a kernel. A page in a saved notebook has none, and everything but new runs works.
// The kernel's side is a widget without a view: its model registers here, and pages of the same key find it.
const links = (globalThis.nbrunnerExplorers ??= new Map());

function registerLink(model) {
  const key = model.get("key");
  links.set(key, model);
  globalThis.dispatchEvent(new CustomEvent("nbrunner-explorer", { detail: key }));
  return () => {
    if (links.get(key) === model) links.delete(key);
    globalThis.dispatchEvent(new CustomEvent("nbrunner-explorer", { detail: key }));
  };
}

class Link {
  constructor(key, onState, onMessage) {
    this.key = key;
    this.waiting = new Map();
    this.count = 0;
    this.onState = onState;
    this.listener = (message, buffers) => this.receive(message, buffers, onMessage);
    this.changed = (event) => event.detail === key && this.connect();
    globalThis.addEventListener("nbrunner-explorer", this.changed);
    this.connect();
  }

  connect() {
    const model = links.get(this.key);
    if (model === this.model) return;
    if (this.model) this.model.off("msg:custom", this.listener);
    this.model = model;
    if (model) model.on("msg:custom", this.listener);
    else this.fail("the kernel has ended");
    this.onState(Boolean(model));
  }

  get live() { return Boolean(this.model); }

  tell(content) { if (this.model) this.model.send({ ...content, seq: 0 }); }

  ask(content) {
    if (!this.model) return Promise.reject(new Error("no kernel: run the cell again to make new runs"));
    const seq = `${Math.random().toString(36).slice(2)}${++this.count}`;
    return new Promise((resolve, reject) => {
      this.waiting.set(seq, { resolve, reject });
      this.model.send({ ...content, seq });
    });
  }

  receive(message, buffers, onMessage) {
    const waiting = this.waiting.get(message.seq);
    if (!waiting) { if (!message.seq) onMessage(message, buffers); return; }
    this.waiting.delete(message.seq);
    if (message.error) waiting.reject(new Error(message.error));
    else waiting.resolve({ ...message, buffers });
  }

  fail(why) {
    for (const { reject } of this.waiting.values()) reject(new Error(why));
    this.waiting.clear();
  }

  close() {
    globalThis.removeEventListener("nbrunner-explorer", this.changed);
    if (this.model) this.model.off("msg:custom", this.listener);
  }
}
