// An IChatClient of Microsoft.Extensions.AI. Never compiled: nuget.org cannot be reached from the tests.
using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.Extensions.AI;

namespace LlamaOnnx
{
    /// <summary>Answers each request in a session of its own.</summary>
    public sealed class ChatClient : IChatClient
    {
        private readonly Model _model;

        public ChatClient(string package) => _model = Model.Open(package);

        public async Task<ChatResponse> GetResponseAsync(
            IEnumerable<ChatMessage> messages, ChatOptions options = null,
            CancellationToken cancellationToken = default)
        {
            var updates = new List<ChatResponseUpdate>();
            await foreach (var update in GetStreamingResponseAsync(messages, options, cancellationToken))
                updates.Add(update);
            return updates.ToChatResponse();
        }

        public async IAsyncEnumerable<ChatResponseUpdate> GetStreamingResponseAsync(
            IEnumerable<ChatMessage> messages, ChatOptions options = null,
            [EnumeratorCancellation] CancellationToken cancellationToken = default)
        {
            using var session = _model.OpenSession();
            session.Append(messages.Select(m => new Message(m.Role.Value, m.Text)));
            await foreach (var piece in session.StreamAsync(How(options), cancellationToken))
                yield return new ChatResponseUpdate(ChatRole.Assistant, piece);
        }

        private Sampling How(ChatOptions options)
        {
            var how = _model.DefaultSampling();
            how.MaxNewTokens = options?.MaxOutputTokens ?? how.MaxNewTokens;
            how.Temperature = options?.Temperature ?? how.Temperature;
            how.TopK = options?.TopK ?? how.TopK;
            how.TopP = options?.TopP ?? how.TopP;
            how.Seed = options?.Seed ?? how.Seed;
            foreach (var text in options?.StopSequences ?? new List<string>()) how.Stop.Add(text);
            return how;
        }

        public object GetService(Type serviceType, object serviceKey = null) =>
            serviceKey == null && serviceType.IsInstanceOfType(this) ? this : null;

        public void Dispose() => _model.Dispose();
    }
}
