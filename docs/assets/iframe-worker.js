// Pages opened from a file may start no worker, and the site's search runs in one: this gives it a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.queue = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      const source = String(url).replace(/[&"<]/g, (c) => `&#${c.charCodeAt(0)};`)
      // The worker's own names, in a window: postMessage answers, importScripts adds scripts one after another.
      this.frame.srcdoc = `<body><script>
        window.postMessage = (data) => parent.dispatchEvent(new CustomEvent("worker-answer", { detail: { frame: window, data } }))
        window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done) => {
          const script = document.createElement("script")
          script.src = new URL(url, "${source}")
          script.onload = script.onerror = done
          document.body.append(script)
        })), Promise.resolve())
      <\/script><script src="${source}"><\/script></body>`
      this.frame.onload = () => {
        for (const data of this.queue) this.deliver(data)
        this.queue = null
      }
      window.addEventListener("worker-answer", ({ detail }) => {
        if (detail.frame !== this.frame.contentWindow) return
        const message = new MessageEvent("message", { data: detail.data })
        this.dispatchEvent(message)
        this.onmessage?.(message)
      })
      document.body.append(this.frame)
    }
    deliver(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
    postMessage(data) {
      if (this.queue) this.queue.push(data)
      else this.deliver(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
