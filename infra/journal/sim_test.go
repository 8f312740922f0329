package journal_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	simSeeds = flag.Int64("seeds", 2000, "how many seeds the simulation runs")
	simFrom  = flag.Int64("from", 1, "the first of them")
	simSeed  = flag.Uint64("seed", 0, "the one seed to run, with its whole trace")
	simShort = flag.Bool("brief", false, "tell no trace of a seed that fails")
)

// simulate runs one seed. It tells what went wrong, and its trace.
func simulate(t *testing.T, seed uint64, steps int64, without map[string]bool) (w *world, err error) {
	synctest.Test(t, func(*testing.T) {
		w = newWorld(seed, steps, without)
		w.tell = steps > 0
		err = w.run()
	})
	if err == nil {
		err = w.check() // outside, where time passes
	}
	return w, err
}

// TestSimulation runs the journal in thousands of worlds. `make simulate` runs more of them.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		w, err := simulate(t, *simSeed, drawnSteps(*simSeed), nil)
		fmt.Println(strings.Join(w.trace, "\n"))
		if err != nil {
			t.Fatalf("seed %d: %v", *simSeed, err)
		}
		return
	}
	var next, done atomic.Int64
	next.Store(*simFrom)
	var failed atomic.Bool
	began, said := time.Now(), time.Now()
	var mu sync.Mutex
	t.Run("seeds", func(t *testing.T) {
		for worker := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint(worker), func(t *testing.T) {
				t.Parallel()
				for {
					seed := next.Add(1) - 1
					if seed >= *simFrom+*simSeeds || failed.Load() {
						return
					}
					if _, err := simulate(t, uint64(seed), 0, nil); err != nil && !failed.Swap(true) {
						report(t, uint64(seed), err)
					}
					done.Add(1)
					mu.Lock()
					if time.Since(said) > 5*time.Second && *simSeeds > 10_000 {
						said = time.Now()
						fmt.Fprintf(os.Stderr, "%d of %d seeds, %.0f a second\n", done.Load(), *simSeeds, float64(done.Load())/time.Since(began).Seconds())
					}
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%d seeds, %.0f a second", done.Load(), float64(done.Load())/time.Since(began).Seconds())
}

// drawnSteps is how long the seed's chaos is, if nobody says otherwise.
func drawnSteps(seed uint64) int64 { return newWorld(seed, 0, nil).steps }

// report makes the failing run as small as it gets, and tells it: with as few kinds of faults, and then as few steps, as
// make it fail.
func report(t *testing.T, seed uint64, err error) {
	t.Errorf("seed %d: %v", seed, err)
	if *simShort {
		return
	}
	steps := drawnSteps(seed)
	without := map[string]bool{}
	smallest, smallestErr := simulate(t, seed, steps, nil)
	for _, f := range allFaults {
		trial := maps.Clone(without)
		trial[f] = true
		if w, err := simulate(t, seed, steps, trial); err != nil {
			without, smallest, smallestErr = trial, w, err
		}
	}
	for n := int64(5); n < steps; n += n/8 + 1 {
		if w, err := simulate(t, seed, n, without); err != nil {
			smallest, smallestErr = w, err
			break
		}
	}
	t.Logf("the smallest run of the seed that fails, without %v:\n%s\n%v\n\nrepeat it with make simulate SEED=%d",
		slices.Sorted(maps.Keys(without)), strings.Join(smallest.trace, "\n"), smallestErr, seed)
}

// TestASeedIsARun holds the simulation to its promise: a seed that fails can be looked at again.
func TestASeedIsARun(t *testing.T) {
	for seed := range uint64(30) {
		once, _ := simulate(t, seed, 0, nil)
		again, _ := simulate(t, seed, 0, nil)
		if once.hash != again.hash {
			t.Fatalf("seed %d runs in two ways", seed)
		}
	}
}
