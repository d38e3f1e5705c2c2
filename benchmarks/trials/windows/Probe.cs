// Uses LlamaOnnx.cs as an app would, for `nox -s windows -- --csharp`; prints one fact per line.
using System;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using LlamaOnnx;

internal static class Probe
{
    private static async Task Main(string[] arguments)
    {
        using var model = await Model.OpenAsync(arguments[0]);
        Console.WriteLine($"provider {model.Provider}");
        Console.WriteLine($"cancelled {await CancelAfter(model, 3)}");
        Console.WriteLine($"left {await LeaveAfter(model, 2)}");
        // Two answers at once: the second waits for the first.
        var counts = await Task.WhenAll(Count(model), Count(model));
        Console.WriteLine($"waited {counts[0] == counts[1] && counts[0] > 3}");
        try
        {
            await Count(model, "");
        }
        catch (ModelException error)
        {
            Console.WriteLine($"refused {error.Message}");
        }
        try
        {
            await Model.OpenAsync(arguments[0], "cuda");
        }
        catch (ModelException error)
        {
            Console.WriteLine($"refused {error.Message}");
        }
    }

    private static async Task<int> CancelAfter(Model model, int pieces)
    {
        using var stop = new CancellationTokenSource();
        var count = 0;
        try
        {
            await foreach (var piece in model.GenerateAsync("the", 200, stop.Token))
                if (++count == pieces) stop.Cancel();
        }
        catch (OperationCanceledException)
        {
            return count;
        }
        return -1;
    }

    private static async Task<int> LeaveAfter(Model model, int pieces)
    {
        var count = 0;
        await foreach (var piece in model.GenerateAsync("the", 200))
            if (++count == pieces) break;
        return count;
    }

    private static async Task<int> Count(Model model, string prompt = "the quick")
    {
        var count = 0;
        await foreach (var piece in model.GenerateAsync(prompt, 40)) count += piece.Length;
        return count;
    }
}
