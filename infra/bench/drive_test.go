//go:build bench

package bench_test

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// stat is what a run has come to. Latencies are in milliseconds.
type stat struct{ rate, p50, p99 float64 }

func statOf(n int, took time.Duration, latencies []time.Duration) stat {
	slices.Sort(latencies)
	at := func(p float64) float64 {
		if len(latencies) == 0 {
			return math.NaN()
		}
		return latencies[int(p*float64(len(latencies)-1))].Seconds() * 1000
	}
	return stat{float64(n) / took.Seconds(), at(0.5), at(0.99)}
}

// load is how an operation is asked for: by so many callers, each of whom waits for its answer, or at a rate,
// whether answers come or not.
type load struct {
	callers int
	rate    float64
}

// openCallers is how many operations may be open at a time when they are asked for at a rate: more than ever are, on a
// machine that bears the rate.
const openCallers = 1024

func closed(callers int) load     { return load{callers: callers} }
func open(perSecond float64) load { return load{openCallers, perSecond} }

// drive has the operation done until the time is over. What ends within it, after the warm-up, counts. The latency of an
// operation at a rate is counted from when it should have begun: one that had to wait for a caller was late already.
func drive(l load, op func(caller int) error) (stat, error) {
	began := time.Now()
	from := began.Add(warms())
	to := from.Add(runs())
	var next atomic.Int64
	var failed atomic.Pointer[error]
	latencies := make([][]time.Duration, l.callers)
	var all sync.WaitGroup
	for w := range l.callers {
		all.Go(func() {
			for failed.Load() == nil {
				start := time.Now()
				if l.rate > 0 {
					start = began.Add(time.Duration(float64(next.Add(1)) / l.rate * float64(time.Second)))
					if start.After(to) {
						return
					}
					time.Sleep(time.Until(start))
				}
				if err := op(w); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				end := time.Now()
				if end.After(to) {
					return
				}
				if end.After(from) {
					latencies[w] = append(latencies[w], end.Sub(start))
				}
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return stat{}, *err
	}
	seen := slices.Concat(latencies...)
	return statOf(len(seen), runs(), seen), nil
}
