package kafka

import (
	"net"
	"sync"
	"testing"

	"github.com/twmb/franz-go/pkg/kfake"
)

// The broker goes away and comes back: everything goes on by itself, and nothing is lost or read twice.
func TestBrokerRestarts(t *testing.T) {
	onlyFake(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	dir := t.TempDir()
	start := func() *kfake.Cluster {
		cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(port), kfake.DataDir(dir), kfake.SyncWrites())
		if err != nil {
			t.Fatal(err)
		}
		return cluster
	}
	cluster := start()
	defer func() { cluster.Close() }()
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 1)
	log := c.PublicLog(name)
	ctx := bounded(t)

	const rounds, n = 3, 10
	appended := func(round int) {
		for i := range n {
			for log.AppendBatch(ctx, 0, numbered(0, round*n+i, 1)) != nil && ctx.Err() == nil {
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { wantNumbers(t, readTo(t, log, 0, 0, rounds*n), 0, rounds*n) })
	o := newOwners(t)
	stop := o.member(ctx, c, "one", "owners", []string{name})
	cfg := testConfig("policies")
	cfg.Targets = nil
	s := subscribe(t, c, name, cfg)
	next := int64(0)
	handled := func() {
		for end := next + n; next < end; {
			msg := s.next()
			switch _, r := RecordOf(msg); {
			case r.Offset == next:
				next++
			case r.Offset > next: // a lower one comes again because its commit was lost
				t.Fatalf("got offset %d, want %d", r.Offset, next)
			}
			msg.Ack()
		}
	}

	for round := range rounds {
		if round > 0 {
			cluster.Close()
			o.await(ctx, "without broker", func(n map[string]int) bool { return n["one"] == 0 })
		}
		var appends sync.WaitGroup
		appends.Go(func() { appended(round) })
		if round > 0 {
			cluster = start()
		}
		handled()
		appends.Wait()
		o.await(ctx, "with a broker", func(n map[string]int) bool { return n["one"] == 1 })
	}
	wg.Wait()
	stop()
}
