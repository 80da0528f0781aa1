// Browsers start no workers for pages opened from a disk. There the search runs in a hidden frame instead; the theme
// knows it by the name IFrameWorker.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      this.send = inside.postMessage.bind(inside)
      window.addEventListener("message", event => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      inside.document.open()
      inside.document.write(`<script>
        postMessage = data => parent.postMessage(data, "*")
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {
          const script = document.createElement("script")
          script.src = url
          script.onload = done
          document.body.appendChild(script)
        })), Promise.resolve())
      <\/script><body><script src="${url}"><\/script></body>`)
      inside.document.close()
      this.ready = new Promise(done => frame.addEventListener("load", done))
    }

    postMessage(data) {
      this.ready.then(() => this.send(data, "*"))
    }
  }
  window.Worker = window.IFrameWorker
}
