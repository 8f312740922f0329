package postgres

import (
	"context"
	"testing"
)

// BenchmarkLive measures how many events a second all read models together take in while they are behind, and
// BenchmarkReplay how many a replay of all of them does.
func BenchmarkLive(b *testing.B) {
	s := benchShop()
	for b.Loop() {
		pool := openTest(b)
		e := newEngine(b, pool, s)
		stop := start(b, e)
		s.caughtUp(b, pool)
		stop()
	}
	b.ReportMetric(float64(s.ids)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

func BenchmarkReplay(b *testing.B) {
	s := benchShop()
	pool := openTest(b)
	e := newEngine(b, pool, s)
	var names []string
	for _, m := range e.Models {
		names = append(names, m.Name)
	}
	for b.Loop() {
		if err := e.Replay(context.Background(), names, ReplayOptions{}, func(Progress) {}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(s.ids)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

func benchShop() *shop {
	s := newShop()
	s.stock(100)
	for i := range 2000 {
		s.order(i, 25)
	}
	return s
}
