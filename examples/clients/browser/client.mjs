// Chromium: OpenAI's package in a page of another origin, with preflights.
// Needs a chat model.
// The server allows the page's origin: python main.py serve smollm2 --allowed-origin http://localhost:5173
import assert from 'node:assert'
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import path from 'node:path'
import { chromium } from 'playwright-core'

const packages = path.join(import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname), 'node_modules')
const page = `<!doctype html><title>A page of another origin</title><link rel="icon" href="data:,"><script type="module">
import OpenAI from '/openai/index.mjs'
window.ready = true
window.ask = async (baseURL, model) => {
  const client = new OpenAI({ baseURL, apiKey: 'none', dangerouslyAllowBrowser: true, maxRetries: 0 })
  const asked = { model, messages: [{ role: 'user', content: 'Name the capital of France.' }], temperature: 0, max_tokens: 40 }
  const whole = (await client.chat.completions.create(asked)).choices[0].message.content
  let streamed = '', chunks = 0
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
    streamed += chunk.choices[0]?.delta?.content ?? ''
    chunks++
  }
  const error = await client.chat.completions.create({ ...asked, temperature: 3 }).catch(e => e)
  const response = (await client.responses.create({ model, input: asked.messages[0].content, temperature: 0 })).output_text
  return { whole, streamed, chunks, response, status: error.status, message: error.message }
}
</script>`

const serve = port => new Promise((resolve, reject) => {
  const server = createServer(async (request, reply) => {
    if (request.url === '/') return reply.writeHead(200, { 'content-type': 'text/html' }).end(page)
    const file = path.join(packages, path.normalize(request.url))
    reply.writeHead(200, { 'content-type': 'text/javascript' }).end(await readFile(file).catch(() => ''))
  })
  server.on('error', reject).listen(port, 'localhost', () => resolve(server))
})

const servers = [await serve(5173), await serve(0)]
const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium'
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-dev-shm-usage'] })
try {
  const outcomes = []
  for (const server of servers) {
    const origin = `http://localhost:${server.address().port}`
    const tab = await browser.newPage()
    const preflights = []
    const session = await tab.context().newCDPSession(tab)
    await session.send('Network.enable')
    session.on('Network.requestWillBeSent', event => { if (event.request.method === 'OPTIONS') preflights.push(event.request.url) })
    await tab.goto(origin)
    await tab.waitForFunction(() => window.ready)
    const told = await tab.evaluate(
      ([url, model]) => window.ask(url, model).catch(error => ({ refused: `${error.name}: ${error.message}` })),
      [process.env.OPENAI_BASE_URL, process.env.MODEL],
    )
    outcomes.push({ ...told, preflights: preflights.length })
  }
  const [allowed, other] = outcomes
  assert(!allowed.refused, `http://localhost:5173 may not call the server (--allowed-origin): ${allowed.refused}`)
  assert.equal(allowed.streamed, allowed.whole)
  assert.equal(allowed.response, allowed.whole)
  assert.equal(allowed.status, 400)
  console.log(browser.browserType().name(), browser.version())
  console.log('http://localhost:5173:', allowed.whole, `(streamed in ${allowed.chunks} chunks, ${allowed.preflights} preflights)`)
  console.log('an error can be read there:', allowed.message)
  assert(other.refused, 'a page whose origin is not allowed could call the server')
  console.log('another origin:', other.refused)
} finally {
  await browser.close()
  servers.forEach(server => server.close())
}
