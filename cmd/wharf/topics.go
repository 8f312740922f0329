package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"wharf/infra/embedded"
	"wharf/infra/journal"
	"wharf/infra/kafka"
)

type topicsCmd struct {
	Create topicsCreateCmd `cmd:"" default:"withargs" help:"Create the topics that are missing, and check them all."`
	Skip   topicsSkipCmd   `cmd:"" help:"Have every reader pass over a journal record whose format nobody knows. Its partition has halted on it."`
}

// demoFlag finds a running demo for programs that are not told any address.
type demoFlag struct {
	DataDir string `name:"data-dir" env:"WHARF_DATA_DIR" default:".wharf" help:"Where no address is given: the data directory of a running demo."`
}

type topicsCreateCmd struct {
	KafkaBrokers brokers `name:"kafka-brokers" env:"WHARF_KAFKA_BROKERS" placeholder:"HOST:PORT" help:"Kafka's brokers; those of the running demo if not given."`
	demoFlag
	partitionsFlag
	ReplicationFactor int  `env:"WHARF_REPLICATION_FACTOR" default:"3" help:"Replicas of every partition."`
	CheckOnly         bool `help:"Create nothing."`
	JSON              bool `help:"Print the topics as JSON."`
}

// Run implements the subcommand.
func (c *topicsCreateCmd) Run(ctx context.Context) error {
	if c.ReplicationFactor < 1 {
		return usageError("--replication-factor must be above 0")
	}
	brokers, demo, err := brokersOf(c.KafkaBrokers, c.DataDir)
	if err != nil {
		return err
	}
	if demo {
		c.ReplicationFactor = 1
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: brokers, ClientID: "wharf-topics"})
	if err != nil {
		return err
	}
	defer client.Close()
	specs := topicSpecs(c.Partitions, c.ReplicationFactor)
	if !c.CheckOnly {
		if err := client.CreateTopics(ctx, specs); err != nil {
			return err
		}
	}
	if err := client.CheckTopics(ctx, specs); err != nil {
		return err
	}
	if c.JSON {
		type topic struct {
			Name              string `json:"name"`
			Partitions        int32  `json:"partitions"`
			ReplicationFactor int16  `json:"replication_factor"`
		}
		items := make([]topic, len(specs))
		for i, s := range specs {
			items[i] = topic{s.Name, s.Partitions, s.Replication}
		}
		return printJSON(map[string]any{"items": items})
	}
	for _, s := range specs {
		fmt.Fprintf(stdout, "%-20s %d partitions, ok\n", s.Name, s.Partitions)
	}
	return nil
}

// brokersOf is the brokers that were named, or those of the demo in the directory.
func brokersOf(named []string, dir string) (brokers []string, demo bool, err error) {
	if len(named) > 0 {
		return named, false, nil
	}
	r, err := embedded.ReadRuntime(dir)
	return r.Brokers, true, err
}

type topicsSkipCmd struct {
	Topic        string  `arg:"" help:"The journal, such as orders.journal."`
	Partition    int32   `arg:"" help:"The partition that has halted."`
	Offset       int64   `arg:"" help:"The offset of the record that it has halted on."`
	KafkaBrokers brokers `name:"kafka-brokers" env:"WHARF_KAFKA_BROKERS" placeholder:"HOST:PORT" help:"Kafka's brokers; those of the running demo if not given."`
	demoFlag
}

// Run implements the subcommand.
func (c *topicsSkipCmd) Run(ctx context.Context) error {
	if !slices.ContainsFunc(services, func(s string) bool { return journalTopic(s) == c.Topic }) {
		return usageError(c.Topic + " is no journal: " + strings.Join(services, ".journal, ") + ".journal are")
	}
	brokers, _, err := brokersOf(c.KafkaBrokers, c.DataDir)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: brokers, ClientID: "wharf-topics"})
	if err != nil {
		return err
	}
	defer client.Close()
	partitions, err := client.Partitions(ctx, c.Topic)
	if err != nil {
		return err
	}
	if c.Partition < 0 || int(c.Partition) >= partitions {
		return usageError(fmt.Sprintf("%s has the partitions 0 to %d", c.Topic, partitions-1))
	}
	log := client.Log(c.Topic)
	end, err := log.End(ctx, c.Partition)
	if err != nil {
		return err
	}
	if c.Offset < 0 || c.Offset >= end {
		return usageError(fmt.Sprintf("%s partition %d ends at offset %d", c.Topic, c.Partition, end))
	}
	var halts bool
	read := errors.New("read")
	err = log.Read(ctx, c.Partition, c.Offset, func(b journal.Batch) error {
		if len(b.Records) > 0 && b.Records[0].Offset == c.Offset {
			_, verdict := journal.Judge(b.Records[0], partitions, func(string) journal.Head { return journal.Head{} })
			halts = verdict == journal.TooNew
		}
		return read
	})
	if !errors.Is(err, read) {
		return err
	}
	if !halts {
		return fmt.Errorf("no reader halts on %s/%d/%d: there is nothing to skip", c.Topic, c.Partition, c.Offset)
	}
	if err := log.Append(ctx, journal.NewSkipRecord(c.Partition, c.Offset)); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "readers that have halted on %s/%d/%d go on behind it\n", c.Topic, c.Partition, c.Offset)
	return nil
}
