package main

import (
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) exchangeCommand() *cobra.Command {
	f := interceptFlags{req: api.InterceptRequest{Kind: api.KindExchange}}
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "exchange SERVICE --expose LOCAL[:REMOTE]",
		Short: "Have all traffic of a Service come to a local port",
		Long: `Exchange leads all new connections of a Service's exposed ports to this machine,
over TCP and UDP, until ` + "`" + a.name + " leave`" + `. REMOTE is the Service's port, its name, or the
targetPort; without it, it is LOCAL. Ports that are not exposed stay with the pods that serve
them now, and so does everything while this machine does not answer: asleep, cut
off, or nothing listens at LOCAL.

SERVICE may also be deployment/NAME, statefulset/NAME or pod/NAME: the Service that selects its
pods. With --mode scale the pods of a workload are replaced instead, for clients that use pod
addresses: that cannot fail open.`,
		Example: examples(a.name, `
culvert exchange tomcat --expose 8080
culvert exchange shop --expose 3000:http,9090:metrics
culvert exchange deployment/dns --expose 5353:53/udp
# let callers see that the local program is down, instead of its pods answering
culvert exchange shop --expose 3000:80 --on-local-refused refuse
# a colleague has it: be next
culvert exchange shop --expose 3000:80 --wait 30m
# clients use pod IPs (StatefulSet, registry)
culvert exchange statefulset/db --expose 5432 --mode scale`),
		Args:              exactlyOne("a Service", "tomcat --expose 8080"),
		ValidArgsFunction: a.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.req.Target, f.req.Wait = args[0], wait
			if err := f.checkExchange(a.name); err != nil {
				return err
			}
			return f.run(cmd.Context(), a)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.req.Mode, "mode", api.ModeSelector, "selector, or scale: replace a workload's pods, for clients that use pod IPs")
	flags.StringVar(&f.req.OnLocalRefused, "on-local-refused", api.OnRefusedOrigin, "who serves while nothing listens at LOCAL: origin, or refuse")
	flags.StringVar(&f.req.OnConflict, "on-conflict", api.OnConflictReplay, "when somebody else changes the Service meanwhile: reapply (3 times in 10 min at most), or leave it to them")
	flags.DurationVar(&wait, "wait", 0, "when somebody else has it: wait so long for its end")
	flags.DurationVar(&f.req.Drain, "drain", 0, "at the end: how long open connections have to end (default 30s)")
	f.add(cmd, true)
	complete(cmd, "mode", fixedCompletion(api.ModeSelector, api.ModeScale))
	complete(cmd, "on-local-refused", fixedCompletion(api.OnRefusedOrigin, api.OnRefusedRefuse))
	complete(cmd, "on-conflict", fixedCompletion(api.OnConflictReplay, api.OnConflictLeave))
	return cmd
}

// checkExchange refuses what can be seen to be wrong without a cluster.
func (f *interceptFlags) checkExchange(name string) error {
	switch f.req.Mode {
	case api.ModeSelector, api.ModeScale:
	case "ephemeral":
		return usageErrorf("use --mode selector, which is the default, for clients that use the Service, or --mode scale for clients that use pod IPs",
			"--mode ephemeral puts a container into the pods of others, which culvert does not do")
	default:
		return usageErrorf("selector or scale", "--mode %q is unknown", f.req.Mode)
	}
	if r := f.req.OnLocalRefused; r != api.OnRefusedOrigin && r != api.OnRefusedRefuse {
		return usageErrorf("origin or refuse", "--on-local-refused %q is unknown", r)
	}
	if c := f.req.OnConflict; c != api.OnConflictReplay && c != api.OnConflictLeave {
		return usageErrorf("reapply or leave", "--on-conflict %q is unknown", c)
	}
	if f.req.Wait < 0 || f.req.Drain < 0 {
		return usageErrorf("give a duration such as 30s or 10m", "--wait and --drain cannot be negative")
	}
	if len(f.req.Expose) == 0 {
		return usageErrorf(name+" exchange "+f.req.Target+" --expose 8080", "no --expose: which local port shall the traffic come to?")
	}
	return nil
}

func (a *app) previewCommand() *cobra.Command {
	f := interceptFlags{req: api.InterceptRequest{Kind: api.KindPreview}}
	cmd := &cobra.Command{
		Use:   "preview NAME --expose LOCAL[:REMOTE]",
		Short: "Make a new Service that a local port answers",
		Long: `Preview makes a new Service whose connections come to this machine, so that
others in the cluster can try what runs here. It ends with ` + "`" + a.name + " leave NAME`" + `.
REMOTE is the new Service's port; without it, it is LOCAL.`,
		Example: examples(a.name, `
culvert preview tomcat-v2 --expose 8080
culvert preview api-next --expose 3000:80
# with an address outside of the cluster
culvert preview api-next --expose 3000:80 --external
culvert preview api-next --expose 3000:80 --host api-next.example.com --ingress-class nginx`),
		Args: exactlyOne("a name for the new Service", "tomcat-v2 --expose 8080"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.req.Target = args[0]
			switch {
			case len(f.req.Expose) == 0:
				return usageErrorf(a.name+" preview "+args[0]+" --expose 8080", "no --expose: which local port shall answer?")
			case f.req.IngressClass != "" && f.req.Host == "":
				return usageErrorf("--host NAME", "--ingress-class goes with --host")
			}
			if err := cluster.CheckPreview(args[0], f.req.Host); err != nil {
				return err
			}
			return f.run(cmd.Context(), a)
		},
	}
	cmd.Flags().BoolVar(&f.req.External, "external", false, "type LoadBalancer, or with --host an Ingress: wait for its address and print it")
	cmd.Flags().StringVar(&f.req.Host, "host", "", "make an Ingress for this host name")
	cmd.Flags().StringVar(&f.req.IngressClass, "ingress-class", "", "class of the Ingress (default: the cluster's default class)")
	cmd.Flags().DurationVar(&f.req.Drain, "drain", 0, "at the end: how long open connections have to end (default 30s)")
	f.add(cmd, true)
	return cmd
}

func (a *app) exposeCommand() *cobra.Command {
	f := interceptFlags{req: api.InterceptRequest{Kind: api.KindExpose}}
	cmd := &cobra.Command{
		Use:   "expose LOCAL[:REMOTE] ...",
		Short: "Open ports on the agent's pod that lead to local ports",
		Long: `Expose opens ports on the address of the session's agent pod, for programs that
register themselves by IP (Nacos, Eureka, Dubbo): register the printed address, and every pod
reaches this machine there. It stays the same while the session lives.`,
		Example: examples(a.name, `
culvert expose 8080
culvert expose 8080 9090:9091 5353:53/udp
# in the variables of a registry's client
eval "$(culvert env --advertise nacos)"`),
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.req.Expose = args
			return f.run(cmd.Context(), a)
		},
	}
	f.add(cmd, false)
	return cmd
}

// exactlyOne is cobra.ExactArgs(1) with an error that tells what is missing.
func exactlyOne(what, example string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return usageErrorf(cmd.CommandPath()+" "+example, "%s needs %s", cmd.Name(), what)
		case len(args) > 1:
			return usageErrorf(cmd.CommandPath()+" --help", "%s takes one name, not %s", cmd.Name(), strings.Join(args, " "))
		}
		return nil
	}
}
