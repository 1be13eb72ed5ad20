package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) pingCommand() *cobra.Command {
	var count int
	var timeout seconds
	cmd := &cobra.Command{
		Use:   "ping SERVICE|POD|IP[:PORT]",
		Short: "Measure the way to something in the cluster",
		Long: `Ping probes a pod with ICMP and a Service with a TCP connection, through the
tunnel. It exits 1 when nothing answers.`,
		Example: examples(a.name, `
culvert ping my-service
culvert ping my-service.other-namespace
culvert ping pod/web-0
culvert ping 10.244.1.7
culvert ping -c 1 10.96.0.1:443`),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 || count > 10000 {
				return usageErrorf("", "--count %d is not between 1 and 10000", count)
			}
			return a.ping(cmd.Context(), api.PingRequest{
				Context: a.context, Target: qualified(args[0], a.namespace), Count: count, Timeout: time.Duration(timeout),
			})
		},
	}
	// ping(8)'s letters. -c is --kubeconfig elsewhere; a running session needs none.
	cmd.Flags().StringVar(&a.kubeconfig, "kubeconfig", "", "not used")
	cmd.Flags().Lookup("kubeconfig").Hidden = true
	cmd.Flags().IntVarP(&count, "count", "c", 4, "how many probes")
	cmd.Flags().VarP(&timeout, "timeout", "W", "how long to wait for each answer (default 3s)")
	return cmd
}

// qualified gives a bare name the namespace of --namespace.
func qualified(target, namespace string) string {
	if namespace == "" || strings.ContainsAny(target, ".:") {
		return target
	}
	if _, err := netip.ParseAddr(target); err == nil {
		return target
	}
	return target + "." + namespace
}

func (a *app) ping(ctx context.Context, req api.PingRequest) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	var stats pingStats
	err := api.New(a.socket).Ping(ctx, req, func(r api.PingReply) {
		stats.add(r)
		switch {
		case a.json():
			a.printJSONLine(a.out, r)
		case r.Error != "":
			fmt.Fprintf(a.out, "%s: seq=%d %s\n", printable(r.Target), r.Seq, printable(r.Error))
		default:
			fmt.Fprintf(a.out, "%s: seq=%d time=%s\n", printable(r.Target), r.Seq, milliseconds(r.RTT))
		}
	})
	if err != nil && ctx.Err() == nil {
		return err
	}
	if !a.json() {
		fmt.Fprintln(a.out, stats.String(req.Target))
	}
	if stats.answers == 0 {
		return exitCode(exitFailed)
	}
	return nil
}

// pingStats sums replies up.
type pingStats struct {
	probes, answers int
	min, max, sum   time.Duration
}

func (p *pingStats) add(r api.PingReply) {
	p.probes++
	if r.Error != "" {
		return
	}
	if p.answers == 0 || r.RTT < p.min {
		p.min = r.RTT
	}
	p.max = max(p.max, r.RTT)
	p.sum += r.RTT
	p.answers++
}

func (p *pingStats) String(target string) string {
	loss := 100.0
	if p.probes > 0 {
		loss = 100 * float64(p.probes-p.answers) / float64(p.probes)
	}
	text := fmt.Sprintf("--- %s: %d probes, %d answers, %.0f%% lost", target, p.probes, p.answers, loss)
	if p.answers > 0 {
		text += fmt.Sprintf("; min/avg/max %s/%s/%s", milliseconds(p.min), milliseconds(p.sum/time.Duration(p.answers)), milliseconds(p.max))
	}
	return text
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.3f ms", float64(d)/float64(time.Millisecond))
}
