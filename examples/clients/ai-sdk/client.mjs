// Vercel's AI SDK: generateText, streamText, objects, tools and steps, embeddings; four providers.
// Needs a chat model.
import assert from 'node:assert'
import { createAnthropic } from '@ai-sdk/anthropic'
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from 'ai'
import { z } from 'zod'

const name = process.env.MODEL
const baseURL = process.env.OPENAI_BASE_URL
const openai = createOpenAI({ baseURL, apiKey: 'none' })
const compatible = createOpenAICompatible({ name: 'baton', baseURL, apiKey: 'none', supportsStructuredOutputs: true, includeUsage: true })
const anthropic = createAnthropic({ baseURL, apiKey: 'none' })
const prompt = 'Name the capital of France.'
const City = z.object({ name: z.string(), country: z.string() })
globalThis.AI_SDK_LOG_WARNINGS = false

const models = {
  'openai.chat': openai.chat(name), 'openai.responses': openai.responses(name),
  'openai-compatible': compatible(name), anthropic: anthropic(name),
}
for (const [kind, model] of Object.entries(models)) {
  const asked = { model, temperature: 0, maxOutputTokens: 80 }
  const whole = await generateText({ ...asked, prompt })
  const stream = streamText({ ...asked, prompt })
  let text = ''
  for await (const piece of stream.textStream) text += piece
  assert.equal(text, whole.text)
  assert((await stream.usage).outputTokens > 0)
  const calls = []
  const weather = tool({
    description: 'The weather of a city', inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => { calls.push(city); return `Rain in ${city}, 4 degrees.` },
  })
  const after = await generateText({
    ...asked, prompt: 'What is the weather in Oslo?', tools: { weather }, toolChoice: 'required', stopWhen: stepCountIs(2),
  })
  assert(calls.length > 0)
  console.log(`${kind}: ${text} | tool: ${calls} in ${after.steps.length} steps`)
  if (kind === 'anthropic') continue // asks Anthropic's own models for JSON by a tool; the next lines are about schemas
  const shaped = await generateText({ ...asked, prompt: 'The capital of France?', output: Output.object({ schema: City }) })
  console.log(`${kind}: object`, City.parse(shaped.output))
}
const { embeddings } = await embedMany({ model: openai.embedding(name), values: ['a cat', 'a dog'] })
console.log('embeddings:', embeddings.length, 'of', embeddings[0].length)
