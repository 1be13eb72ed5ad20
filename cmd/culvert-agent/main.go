// Command culvert-agent is the far end of a session, in a pod.
package main

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/culvert-dev/culvert/agent"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	agent.New(agent.Config{}).Run(ctx)
}
