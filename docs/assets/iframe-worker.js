// Search runs in a worker. Browsers start none for pages opened as files, so there a hidden frame takes its place.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      const start = () => {
        document.body.append(frame);
        this.inside = frame.contentWindow;
        this.inside.postMessage = (data) => this.answer(data);
        const script = this.inside.document.createElement("script");
        script.src = url;
        script.onload = () => this.waiting.splice(0).forEach((data) => this.ask(data));
        this.script = script;
        this.inside.document.head.append(script);
        this.frame = frame;
      };
      if (document.body) start();
      else document.addEventListener("DOMContentLoaded", start);
      this.loaded = false;
    }

    postMessage(data) {
      if (this.loaded) this.ask(data);
      else this.waiting.push(data);
    }

    ask(data) {
      this.loaded = true;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }

    answer(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
