//go:build bench

package bench_test

import (
	"os"
	"runtime/pprof"
	"testing"

	"wharf/projections"
)

func TestProf(t *testing.T) {
	l := tellOrders(t, 3000)
	pool := newDatabase(t)
	l.project(t, pool, projections.Orders)
	var ids []string
	for _, id := range l.orders {
		ids = append(ids, id.String())
	}
	api := l.api(t, pool)
	f, _ := os.Create("/tmp/get.prof")
	_ = pprof.StartCPUProfile(f)
	s := serveFor(t, api, client{Callers: 16, Orders: ids[:1000]})
	pprof.StopCPUProfile()
	t.Logf("get %v", s)
	t.Logf("plain %v", serveFor(t, plainGet, client{Callers: 16, Orders: ids[:1000]}))
	t.Logf("raw %v", rawGet(t, pool, 16, ids))
}
