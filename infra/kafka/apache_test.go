package kafka

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"wharf/infra/embedded/apache"
)

var longPauses = flag.Bool("long-pauses", false, "pause Apache Kafka for up to 30 s instead of 5 s")

const think = 20 * time.Millisecond // or there would be more to judge than can be judged

func startBrokers(t *testing.T, brokers int, opts ...apache.Option) *apache.Cluster {
	if !onApache {
		t.Skip("`make test-kafka` runs it: it needs Java and Maven")
	}
	zerolog.SetGlobalLevel(zerolog.Disabled) // some of Toxiproxy knows no other logger
	cluster, err := apache.Start(t.Context(), t.TempDir(), brokers, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Stop)
	return cluster
}

// One broker, which is killed and paused, behind a network that is cut, slow, and loses what it was given.
func TestAnswersAreTrueWhenTheBrokerFails(t *testing.T) {
	network := &network{listen: "127.0.0.1:0"}
	cluster := startBrokers(t, 1, apache.Advertise(func(listens string) (string, error) {
		network.broker = listens
		err := network.change("")
		return network.listen, err
	}))
	t.Cleanup(func() { network.proxy.Stop() })
	broker := cluster.Brokers()[0]
	pauses := []time.Duration{time.Second, 5 * time.Second}
	if *longPauses {
		pauses = append(pauses, 10*time.Second, 30*time.Second)
	}
	underFaults(t, cluster.Addrs(), 1, 100, think, func(o *ordeal) {
		for _, toxic := range []string{
			`"type": "latency", "attributes": {"latency": 50, "jitter": 50}`,
			`"type": "bandwidth", "attributes": {"rate": 20}`,
			`"type": "limit_data", "attributes": {"bytes": 5000}`,                     // cut after so much
			`"type": "timeout", "attributes": {"timeout": 0}`,                         // no answer comes through
			`"type": "timeout", "stream": "upstream", "attributes": {"timeout": 500}`, // no request, and then it is cut
			"",
		} {
			if err := network.change(toxic); err != nil {
				t.Error(err)
			}
			o.goesOn() // in spite of it
		}
		for _, pause := range pauses {
			broker.Pause()
			time.Sleep(pause)
			broker.Resume()
			o.goesOn()
			broker.Kill()
			if err := broker.Start(o.ctx); err != nil {
				t.Error(err)
			}
			o.goesOn()
		}
	})
}

// network lies before a broker.
type network struct {
	listen, broker string
	proxy          *toxiproxy.Proxy
}

// change cuts all connections; of the new ones, some suffer from the toxic. (Toxiproxy can also change what connections
// suffer from while they go on, but hangs when one of them ends at that moment.)
func (n *network) change(toxic string) error {
	if n.proxy != nil {
		n.proxy.Stop()
	}
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	n.proxy = toxiproxy.NewProxy(server, "broker", n.listen, n.broker)
	if toxic != "" {
		if _, err := n.proxy.Toxics.AddToxicJson(strings.NewReader(`{"toxicity": 0.3, ` + toxic + `}`)); err != nil {
			return err
		}
	}
	err := n.proxy.Start()
	n.listen = n.proxy.Listen
	return err
}

// Three brokers, of which one after the other is killed, or stopped in order; leaders move.
func TestAnswersAreTrueWhenBrokersTakeOver(t *testing.T) {
	cluster := startBrokers(t, 3)
	admin, err := sarama.NewClusterAdmin(cluster.Addrs(), connect(t, cluster.Addrs()).conf)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	underFaults(t, cluster.Addrs(), 3, 100, think, func(o *ordeal) {
		for i, broker := range cluster.Brokers() {
			if i == 1 {
				broker.Stop()
			} else {
				broker.Kill()
			}
			o.goesOn() // without it
			if err := broker.Start(o.ctx); err != nil {
				t.Error(err)
			}
			o.goesOn()
			// Those brokers lead again that did at first.
			partitions := []int32{0, 1, 2}
			if _, err := admin.ElectLeaders(sarama.PreferredElection, map[string][]int32{
				o.private: partitions, o.public: partitions}); err != nil {
				o.count(fmt.Sprint("no election: ", err))
			}
			o.goesOn()
		}
	})
}
