// `await foreach`, for .NET Core 3.1 and later: netstandard2.0 has no IAsyncEnumerable.
#if NETCOREAPP
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;

namespace LlamaOnnx
{
    public sealed partial class Session
    {
        /// <summary>Generates an answer in a thread of the pool; its pieces arrive in the context that
        /// awaits them, such as the thread of a window. Leaving the loop ends the answer.</summary>
        public async IAsyncEnumerable<string> StreamAsync(
            Sampling how = null, [EnumeratorCancellation] CancellationToken token = default)
        {
            using var left = CancellationTokenSource.CreateLinkedTokenSource(token);
            using var arrived = new SemaphoreSlim(0);
            var pieces = new ConcurrentQueue<string>();
            var answer = GenerateAsync(
                how,
                piece =>
                {
                    pieces.Enqueue(piece);
                    arrived.Release();
                },
                left.Token);
            var ended = answer.ContinueWith(_ => arrived.Release(), TaskScheduler.Default);
            try
            {
                while (true)
                {
                    await arrived.WaitAsync(token);
                    if (!pieces.TryDequeue(out var piece)) break;
                    yield return piece;
                }
                await answer;
            }
            finally
            {
                left.Cancel(); // the reader may have left
                await ended;
            }
        }
    }
}
#endif
